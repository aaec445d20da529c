// Earlier drawings, as thumbnails: a click shows one again, and each can be deleted.

import {$, make} from "./elements.js";
import {addDrawing, clearDrawings, drawings, openDrawings, removeDrawing} from "./memory.js";
import {address} from "./stage.js";

let open = () => {}; // what a click on a thumbnail does

export async function watchHistory(whenClicked) {
  open = whenClicked;
  $("clear").addEventListener("click", async () => {
    if (!confirm(`Delete ${drawings.length === 1 ? "the one drawing" : `all ${drawings.length} drawings`} that this browser keeps?`)) return;
    await clearDrawings();
    list();
  });
  await openDrawings();
  list();
}

export async function remember(drawing) {
  const kept = addDrawing(drawing);
  list();
  await kept;
  list();
}

function list() {
  $("past").hidden = drawings.length === 0;
  $("history").replaceChildren(...drawings.map(item));
}

function item(drawing) {
  const {settings, images} = drawing, models = [...new Set(images.map(image => image.model))];
  const told = `${settings.prompt} (${models.join(" and ")}, seed ${images[0].seed})`;
  const shown = images.slice(0, models.length); // one of each model
  const thumb = make("button", {type: "button", className: "thumb", title: told, ariaLabel: `Show again: ${told}`},
    ...shown.map(image => make("img", {src: address(image.blob), alt: "", loading: "lazy", decoding: "async"})));
  thumb.addEventListener("click", () => open(drawing));
  const drop = make("button", {type: "button", className: "delete", textContent: "×", ariaLabel: `Delete: ${told}`});
  drop.addEventListener("click", async () => {
    const gone = removeDrawing(drawing);
    list();
    ($("history").querySelector("button") ?? $("prompt")).focus();
    await gone;
  });
  const count = images.length / models.length;
  return make("li", {}, thumb, ...(count > 1 ? [make("span", {className: "count", textContent: `× ${count}`})] : []), drop);
}
