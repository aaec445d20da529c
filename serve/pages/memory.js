// What this browser keeps: the API key and the form's settings (localStorage), the last drawings (IndexedDB).
// Where it keeps nothing, as some private windows do, all of it lasts until the page is left.

const KEPT_DRAWINGS = 60;
const unkept = {};

function recall(name) {
  try { return localStorage.getItem(`emu_ray.${name}`); } catch { return unkept[name] ?? null; }
}

function keep(name, text) {
  unkept[name] = text;
  try {
    if (text === null) localStorage.removeItem(`emu_ray.${name}`); else localStorage.setItem(`emu_ray.${name}`, text);
  } catch { /* it lasts until the page is left */ }
}

export const apiKey = () => recall("key");
export const keepApiKey = key => keep("key", key);
export const keepSettings = settings => keep("settings", JSON.stringify(settings));

export function keptSettings() {
  try { return JSON.parse(recall("settings")) ?? {}; } catch { return {}; }
}

const done = request => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

/** The drawings, newest first. Each is {id, settings, images: [{model, seed, blob}]}. */
export const drawings = [];
let database = null;

async function inDatabase(mode, work) {
  if (!database) return undefined;
  try { return await done(work(database.transaction("drawings", mode).objectStore("drawings"))); } catch { return undefined; } // full, or gone
}

export async function openDrawings() {
  try {
    const opening = indexedDB.open("emu_ray", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("drawings", {keyPath: "id"});
    database = await done(opening);
  } catch { return; }
  const found = await inDatabase("readonly", store => store.getAll()) ?? [];
  drawings.push(...found.reverse());
  await dropOldest();
}

export async function addDrawing(drawing) {
  drawing.id = Math.max(Date.now(), (drawings[0]?.id ?? 0) + 1);
  drawings.unshift(drawing);
  await inDatabase("readwrite", store => store.put(drawing));
  await dropOldest();
}

async function dropOldest() {
  while (drawings.length > KEPT_DRAWINGS) await removeDrawing(drawings.at(-1));
}

export async function removeDrawing(drawing) {
  drawings.splice(drawings.indexOf(drawing), 1);
  await inDatabase("readwrite", store => store.delete(drawing.id));
}

export async function clearDrawings() {
  drawings.length = 0;
  await inDatabase("readwrite", store => store.clear());
}
