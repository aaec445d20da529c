// The form: which models and sizes it offers, what it asks for, what it keeps over a reload.

import {$, make} from "./elements.js";
import {keepSettings, keptSettings} from "./memory.js";

const FIELDS = ["prompt", "negative", "model", "other", "n", "seed", "steps", "guidance", "size", "scheduler"];
const SHAPES = [["square", 1], ["portrait", 2 / 3], ["landscape", 3 / 2], ["tall", 1 / 2], ["wide", 2]];
const SIDE_MULTIPLE_PX = 32, PARTIAL_IMAGES = 3;
let models = []; // of v1/models

export const modeOf = () => $("form").elements.mode.value;

/** The form as it stands, each field a string. */
export function settings() {
  return {mode: modeOf(), ...Object.fromEntries(FIELDS.map(field => [field, $(field).value]))};
}

export function fill(wanted) {
  if ("mode" in wanted && !$("modes").hidden) $("form").elements.mode.value = wanted.mode;
  for (const field of FIELDS) if (field in wanted && !$(field).matches("select")) $(field).value = wanted[field];
  if ("scheduler" in wanted) $("scheduler").value = wanted.scheduler;
  offer({...settings(), ...wanted});
}

/** Keeps the form over a reload; before the models are known, or without a second one, what was chosen of them stays kept. */
export function keepForm() {
  const now = settings();
  if (!models.length) for (const field of ["model", "other", "size"]) delete now[field];
  if ($("modes").hidden) delete now.mode;
  keepSettings({...keptSettings(), ...now});
}

/** The models that the server has, and whether it compares them. */
export function offerModels({data, comparisons}) {
  models = data;
  const able = models.filter(model => model.status !== "failed").length > 1;
  $("modes").hidden = !able;
  $("blind-mode").hidden = !(able && comparisons === true);
  const wanted = {...settings(), ...keptSettings()};
  if (!able || (wanted.mode === "blind" && $("blind-mode").hidden)) wanted.mode = "one";
  $("form").elements.mode.value = wanted.mode;
  fill(wanted);
}

/** The requests that the settings mean, one for each model; a seed is chosen where models share one. */
export function requests(asked) {
  const steps = Number(asked.steps);
  const body = {prompt: asked.prompt, steps, guidance: Number(asked.guidance), size: asked.size || "auto"};
  if (asked.scheduler) body.scheduler = asked.scheduler;
  if (asked.negative.trim()) body.negative_prompt = asked.negative;
  if (asked.seed !== "") body.seed = Number(asked.seed);
  if (asked.mode === "blind") return [{...body, models: [asked.model, asked.other]}];
  Object.assign(body, {n: Number(asked.n), stream: true, progress: true, partial_images: Math.min(PARTIAL_IMAGES, steps - 1)});
  if (asked.mode === "one") return [asked.model ? {...body, model: asked.model} : body];
  body.seed ??= Math.floor(Math.random() * 2 ** 31);
  return [asked.model, asked.other].map(model => ({...body, model}));
}

function offer(wanted) {
  choose($("model"), models.map(modelOption), wanted.model);
  choose($("other"), models.filter(model => model.id !== $("model").value).map(modelOption), wanted.other);
  $("form").className = `${modeOf()} ${models.length < 2 ? "alone" : ""}`;
  const chosen = modeOf() === "one" ? [$("model")] : [$("model"), $("other")];
  const sidesPx = chosen.map(select => models.find(model => model.id === select.value)?.size_px).filter(Boolean);
  const sizes = sizesOf(sidesPx);
  const [width, height] = (wanted.size || "").split("x").map(Number);
  if (!sizes.some(size => size.value === wanted.size) && isDrawable(width, height, sidesPx)) sizes.push(sizeOption(width, height));
  choose($("size"), sizes, wanted.size);
  const preferred = models.find(model => model.id === $("model").value)?.preference;
  $("preference").hidden = !preferred;
  if (preferred) $("preference").textContent = `${$("model").value} is preferred to ${preferred.against} in ${preferred.win} % of ${preferred.n_pairs} pairs`;
}

function choose(select, options, wanted) {
  select.replaceChildren(...options);
  select.value = wanted;
  if (select.selectedIndex < 0) select.value = options.find(option => !option.disabled)?.value ?? "";
}

function modelOption(model) {
  const failed = model.status === "failed";
  return make("option", {value: model.id, textContent: failed ? `${model.id} (failed)` : model.id, disabled: failed});
}

function sizeOption(width, height, shape) {
  return make("option", {value: `${width}x${height}`, textContent: `${width} × ${height}${shape ? ", " + shape : ""}`});
}

function isDrawable(width, height, sidesPx) {
  return sidesPx.length > 0 && sidesPx.every(own => [width, height].every(side => side >= own / 2 && side <= 2 * own && side % SIDE_MULTIPLE_PX === 0) && width * height <= 2 * own ** 2);
}

/** For each shape the size that comes nearest to it with as many pixels as the first model was trained at. */
function sizesOf(sidesPx) {
  const own = sidesPx[0], sides = [], options = new Map();
  for (let side = SIDE_MULTIPLE_PX; side <= 2 * own; side += SIDE_MULTIPLE_PX) sides.push(side);
  const sizes = sides.flatMap(width => sides.map(height => [width, height])).filter(size => isDrawable(...size, sidesPx));
  for (const [shape, ratio] of SHAPES) {
    const farness = ([width, height]) => 2 * Math.abs(Math.log(width / height / ratio)) + Math.abs(Math.log(width * height / own ** 2));
    const same = sizes.filter(([width, height]) => Math.sign(width - height) === Math.sign(ratio - 1));
    const [width, height] = same.sort((a, b) => farness(a) - farness(b))[0] ?? [];
    if (width && !options.has(`${width}x${height}`)) options.set(`${width}x${height}`, sizeOption(width, height, shape));
  }
  return options.size ? [...options.values()] : [make("option", {value: "auto", textContent: "the model's own"})];
}

export function watchSettings(whenModeChanges) {
  const changed = event => {
    if (event.target.matches("select, [name=mode]")) offer(settings());
    keepForm();
    if (event.target.name === "mode") whenModeChanges();
  };
  $("form").addEventListener("input", changed);
  $("form").addEventListener("change", changed); // of a choice some programs that fill in forms tell this alone
  $("form").addEventListener("invalid", () => { $("settings").open = true; }, true); // a folded field can't say what is wrong
  fill(keptSettings());
}
