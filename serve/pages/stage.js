// The pictures: while they are drawn, when they are finished, and large.

import {$, make} from "./elements.js";

const COLUMNS = {1: "single", 2: "double", 3: "triple"};
const addresses = new WeakMap(); // of blobs
let frames = []; // on the stage, in its order
let large = null; // the frame that is shown large

export function address(blob) {
  if (!addresses.has(blob)) addresses.set(blob, URL.createObjectURL(blob));
  return addresses.get(blob);
}

export function mount(newFrames, columns) {
  frames = newFrames;
  $("stage").className = COLUMNS[columns];
  $("stage").replaceChildren(...frames.map(frame => frame.figure));
}

/** One picture's place, from its first step to its last. */
export class Frame {
  image = null; // {model, seed, blob} once it is finished; a model of null is a secret

  constructor({prompt, size, steps}) {
    this.prompt = prompt;
    this.canvas = make("div", {className: "canvas waiting"});
    this.bar = make("progress", {max: Number(steps), value: 0, ariaLabel: "steps done"});
    this.figure = make("figure", {}, this.canvas, this.bar);
    if (size.includes("x")) this.figure.style.setProperty("--ratio", size.replace("x", " / "));
  }

  say(text) {
    if (!this.picture) this.canvas.textContent = text;
  }

  step(event) {
    this.bar.value = event.step;
    this.say("");
    if (event.b64_json) this.look("data:image/png;base64," + event.b64_json);
  }

  look(src) {
    this.canvas.classList.remove("waiting");
    this.picture ??= make("img", {alt: this.prompt});
    this.picture.src = src;
    this.canvas.replaceChildren(this.picture);
  }

  finish(image) {
    this.image = image;
    this.look(address(image.blob));
    this.bar.remove();
    const opener = make("button", {type: "button", className: "canvas", title: "Show it large"}, this.picture);
    opener.addEventListener("click", () => enlarge(this));
    this.canvas.replaceWith(opener);
    if (image.model) this.name(image.model);
    return image;
  }

  name(model) {
    this.image.model = model;
    this.figure.append(make("figcaption", {}, make("b", {textContent: model}), make("span", {textContent: `seed ${this.image.seed}`}), this.link(make("a"))));
  }

  link(anchor) {
    const words = this.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40).replace(/^-|-$/g, "");
    const {model, seed, blob} = this.image;
    return Object.assign(anchor, {href: address(blob), download: `${words || "picture"}-${model}-${seed}.png`, textContent: "Save", hidden: !model});
  }

  stop() {
    this.canvas.classList.remove("waiting");
    if (this.image) return;
    this.say("stopped");
    if (this.picture) this.figure.append(make("figcaption", {textContent: `stopped at step ${this.bar.value} of ${this.bar.max}`}));
    this.bar.remove();
  }
}

function enlarge(frame) {
  large = frame;
  const finished = frames.filter(one => one.image), {model, seed, blob} = frame.image;
  const dialog = $("large"), [caption, anchor] = dialog.querySelectorAll("span, a");
  Object.assign(dialog.querySelector("img"), {src: address(blob), alt: frame.prompt});
  caption.textContent = `${model ? model + ", " : ""}seed ${seed}, ${finished.indexOf(frame) + 1} of ${finished.length}`;
  frame.link(anchor);
  if (!dialog.open) dialog.showModal();
}

function turn(by) {
  const finished = frames.filter(one => one.image);
  enlarge(finished[(finished.indexOf(large) + by + finished.length) % finished.length]);
}

export function watchLarge() {
  $("large").addEventListener("click", event => {
    if (event.target.dataset.by) turn(Number(event.target.dataset.by));
    else if (!event.target.closest("a")) $("large").close();
  });
  $("large").addEventListener("keydown", event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (by) { event.preventDefault(); turn(by); }
  });
}
