// The page: what is typed and pressed becomes requests, and what the server tells becomes pictures and sentences.

import {closePair, choiceOf, drawPair, vote} from "./blind.js";
import {$} from "./elements.js";
import {remember, watchHistory} from "./history.js";
import {apiKey, keepApiKey} from "./memory.js";
import {ask, blobOf, events, Refused} from "./server.js";
import {fill, keepForm, offerModels, requests, settings, watchSettings} from "./settings.js";
import {Frame, mount, watchLarge} from "./stage.js";

const TITLE = document.title;
let leaving = null; // what stops the drawing that is under way
let clock = 0; // the timer that writes beside the status
let lastSeed = "";

function say(text, bad = false) {
  clearInterval(clock);
  $("clock").textContent = "";
  write(text);
  $("status").parentElement.classList.toggle("bad", bad);
}

function write(text) {
  if ($("status").textContent !== text) $("status").textContent = text; // the same words again would be read aloud again
}

/** Each 0.1 s, beside the status, what `text` says after so many seconds, until it says null. */
function count(text) {
  const began = performance.now();
  const tick = () => {
    const told = text((performance.now() - began) / 1000);
    if (told === null) clearInterval(clock); else $("clock").textContent = told;
  };
  clearInterval(clock);
  clock = setInterval(tick, 100);
  tick();
}

function sayRefusal(error) {
  if (!(error instanceof Refused)) console.error(error);
  if (error.status === 401) return needKey(error.message);
  say(error.retryAfterS ? error.message.replace(/\.?$/, ".") : error.message, true);
  if (error.retryAfterS) count(s => s > error.retryAfterS ? "You can try again now." : `Try again in ${Math.ceil(error.retryAfterS - s)} s.`);
}

// Drawing

async function draw(again = false) {
  if (leaving || !$("form").reportValidity()) return;
  const asked = again ? {...settings(), seed: ""} : settings();
  leaving = new AbortController();
  const {signal} = leaving, began = performance.now();
  const seconds = () => `${((performance.now() - began) / 1000).toFixed(1)} s`;
  closePair();
  Object.assign($("go"), {type: "button", textContent: "Stop", className: "go stop"}); // Enter in a field must not stop
  if (matchMedia("(max-width: 860px)").matches) $("go").scrollIntoView({block: "start"});
  say("Drawing,");
  count(s => `${s.toFixed(1)} s`);
  try {
    if (asked.mode === "blind") {
      await drawPair(asked, requests(asked)[0], signal);
      say("Which is better?");
    } else {
      const drawing = await drawAll(asked, signal);
      lastSeed = drawing.settings.seed;
      $("seed-last").disabled = false;
      say(`${drawing.images.length === 1 ? "One picture" : `${drawing.images.length} pictures`} in ${seconds()}.`);
      remember(drawing);
    }
  } catch (error) {
    leaving.abort(); // of two models that draw the other one stops too
    if (error.name === "AbortError") say(`Stopped after ${seconds()}.`);
    else sayRefusal(error);
  } finally {
    leaving = null;
    document.title = TITLE;
    Object.assign($("go"), {type: "submit", textContent: "Draw", className: "go"});
  }
}

/** The finished drawing of one model, or of two from the same seed, whose pictures then alternate. */
async function drawAll(asked, signal) {
  const bodies = requests(asked), rows = [];
  for (let i = 0; i < Number(asked.n); i++) rows.push(bodies.map(() => new Frame(asked)));
  const all = rows.flat();
  const show = () => {
    if (!all[0].figure.isConnected) mount(all, columns(asked.mode, all.length)); // what stood there stays until the server takes the job
    const share = all.reduce((sum, frame) => sum + (frame.image ? 1 : frame.bar.position), 0) / all.length;
    document.title = `${Math.floor(100 * share)} % ${TITLE}`;
  };
  try {
    await Promise.all(bodies.map((body, at) => drawOne(body, rows.map(row => row[at]), signal, show)));
  } finally {
    all.forEach(frame => frame.stop());
  }
  const images = all.map(frame => frame.image);
  return {settings: {...asked, model: images[0].model, seed: String(images[0].seed)}, images};
}

async function drawOne(body, frames, signal, show) {
  const answer = await ask("v1/images/generations", body, signal);
  show();
  const hear = {
    "image_generation.queued": ({position}) => {
      const told = position === 1 ? "1 request before you" : `${position} requests before you`;
      for (const frame of frames) frame.say(position ? told : "");
      write(position ? `${told},` : "Drawing,");
    },
    "image_generation.progress": event => { frames[event.image].step(event); write("Drawing,"); },
    "image_generation.partial_image": event => frames[event.image].step(event),
    "image_generation.completed": ({image, seed, model, b64_json}) => frames[image].finish({model, seed, blob: blobOf(b64_json)}),
  };
  for await (const event of events(answer)) {
    hear[event.type]?.(event);
    show();
  }
  if (!frames.every(frame => frame.image)) throw new Refused("The server ended the answer before the pictures were finished.");
}

function columns(mode, images) {
  if (mode !== "one") return 2;
  return images === 1 ? 1 : images <= 4 ? 2 : 3;
}

async function choose(choice) {
  try {
    const drawing = await vote(choice);
    if (!drawing) return;
    const {winner, settings: asked, images} = drawing;
    say(winner === "neither" ? "A tie." : `You preferred ${winner}.`);
    remember({settings: {...asked, mode: "pair", model: images[0].model, other: images[1].model, n: "1"}, images});
  } catch (error) {
    sayRefusal(error);
  }
}

function showAgain({settings: asked, images}) {
  if (leaving) return;
  closePair();
  const frames = images.map(image => { const frame = new Frame(asked); frame.finish(image); return frame; });
  mount(frames, columns(asked.mode, images.length));
  fill(asked);
  keepForm();
  say("Shown again; its settings are in the form.");
  $("status").scrollIntoView({block: "center"});
}

// The API key

function needKey(sentence) {
  say("");
  $("key-told").textContent = sentence;
  $("key-form").hidden = false;
  $("key").focus();
}

async function start() {
  $("forget").hidden = !apiKey();
  try {
    const body = await (await ask("v1/models")).json();
    $("key-form").hidden = true;
    offerModels(body);
  } catch (error) {
    sayRefusal(error);
  }
}

$("key-form").addEventListener("submit", async event => {
  event.preventDefault();
  keepApiKey($("key").value.trim());
  $("key").value = "";
  await start();
  if ($("key-form").hidden) $("prompt").focus();
});
$("forget").addEventListener("click", () => { keepApiKey(null); start(); });

// Keys and buttons

$("form").addEventListener("submit", event => {
  event.preventDefault();
  draw();
});
$("go").addEventListener("click", () => leaving?.abort());
$("seed-random").addEventListener("click", () => { fill({seed: ""}); keepForm(); });
$("seed-last").addEventListener("click", () => { fill({seed: lastSeed}); keepForm(); });
$("vote").addEventListener("click", event => { const button = event.target.closest("button"); if (button) choose(button.dataset.choice); });
$("next").addEventListener("click", () => draw(true));
$("keys").addEventListener("click", () => $("help").showModal());
$("help").addEventListener("click", event => { if (event.target.matches("dialog, [data-close]")) $("help").close(); });

document.addEventListener("keydown", event => {
  if (document.querySelector("dialog[open]") || event.isComposing) return;
  const choice = choiceOf(event);
  if (event.key === "Escape") leaving?.abort();
  else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) draw();
  else if (event.key === "?" && !event.target.closest("input, textarea")) $("help").showModal();
  else if (choice) choose(choice);
  else return;
  event.preventDefault();
});

if (matchMedia("(max-width: 860px)").matches) $("settings").open = false;
watchLarge();
watchSettings(closePair);
watchHistory(showAgain);
start();
