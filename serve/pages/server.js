// The server's API: one function for any request, one for the events of a drawing. Its refusals become `Refused`.

import {apiKey} from "./memory.js";

export class Refused extends Error {
  constructor(sentence, status = 0, retryAfterS = 0) {
    super(sentence);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

/** The answer to a GET, or to a POST where there is a body. An abort is thrown as it is, anything else as Refused. */
export async function ask(path, body, signal) {
  const headers = {};
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  if (body) headers["Content-Type"] = "application/json";
  const answer = await reached(fetch(path, {method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal}), "The server can't be reached.");
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  throw new Refused(told?.error?.message ?? `The server answered ${answer.status}.`, answer.status, Number(answer.headers.get("Retry-After")));
}

/** The events of a stream, as objects. Refused for an error among them, and for a stream that breaks off. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const {done, value} = await reached(reader.read(), "The connection broke off before the pictures were finished.");
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find(one => one.startsWith("data: "));
      const event = line ? JSON.parse(line.slice(6)) : {};
      if (event.type === "error") throw new Refused(event.error.message);
      yield event;
    }
  }
}

async function reached(promise, otherwise) {
  try {
    return await promise;
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refused(otherwise);
  }
}

export function blobOf(b64) {
  return new Blob([Uint8Array.from(atob(b64), letter => letter.charCodeAt(0))], {type: "image/png"});
}
