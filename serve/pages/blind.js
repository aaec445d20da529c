// Which is better? Two pictures whose models are a secret, a vote, and then the names.

import {$} from "./elements.js";
import {ask, blobOf} from "./server.js";
import {Frame, mount} from "./stage.js";

const KEYS = {ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", t: "tie", T: "tie"};
const won = new Map(); // model -> votes, while the page is open; "tie" is one of them
let pair = null; // {id, left, right} that waits for a vote, left and right being frames

export function closePair() {
  pair = null;
  $("vote").hidden = $("revealed").hidden = true;
}

/** Draws a pair and shows it. */
export async function drawPair(settings, asked, signal) {
  const frames = [new Frame(settings), new Frame(settings)];
  for (const frame of frames) frame.bar.removeAttribute("value"); // nobody tells how far it is
  mount(frames, 2);
  try {
    const body = await (await ask("v1/images/comparisons", asked, signal)).json();
    frames.forEach((frame, at) => frame.finish({model: null, seed: body.seed, blob: blobOf(body[["left", "right"][at]].b64_json)}));
    pair = {id: body.id, left: frames[0], right: frames[1], settings: {...settings, seed: String(body.seed)}};
  } finally {
    frames.forEach(frame => frame.stop());
  }
  $("vote").hidden = false;
  $("vote").focus();
}

/** Sends the vote, shows the names; the drawing, whose models are known now. Undefined where no pair waits. */
export async function vote(choice) {
  if (!pair) return undefined;
  const voted = pair;
  pair = null;
  let body;
  try {
    body = await (await ask(`v1/images/comparisons/${voted.id}/vote`, {choice})).json();
  } catch (error) {
    pair = voted; // the next try may reach the server
    throw error;
  }
  voted.left.name(body.left_model);
  voted.right.name(body.right_model);
  voted[choice]?.figure.classList.add("chosen");
  const winner = {left: body.left_model, right: body.right_model, tie: "neither"}[choice];
  won.set(winner, (won.get(winner) ?? 0) + 1);
  $("tally").textContent = "So far: " + [...won].map(([model, votes]) => `${model} ${votes}`).join(", ");
  $("vote").hidden = true;
  $("revealed").hidden = false;
  $("next").focus();
  return {winner, settings: voted.settings, images: [voted.left.image, voted.right.image]};
}

/** The choice that a key means, while a pair waits and nobody types. */
export function choiceOf(event) {
  const typing = event.target.closest("input, textarea, select");
  return pair && !typing && !event.ctrlKey && !event.metaKey && !event.altKey ? KEYS[event.key] : undefined;
}
