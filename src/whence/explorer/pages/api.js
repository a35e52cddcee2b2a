// Requests to the server of this page: JSON, and streams of one event a line. Aborting a request cancels its work.

export class Problem extends Error {
  constructor(words, status = 0) {
    super(words);
    this.status = status;
  }

  get isAway() {
    return this.status === 0;
  }

  get isForgotten() {
    return this.status === 410;
  }
}

const AWAY = "The server does not answer. It may have been stopped: start whence explore again.";

export const isAbort = (error) => error?.name === "AbortError";

async function request(path, body, signal) {
  const options = { signal, credentials: "same-origin" };
  if (body !== undefined)
    Object.assign(options, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw isAbort(error) ? error : new Problem(AWAY);
  }
  if (!response.ok) throw new Problem(await complaint(response), response.status);
  return response;
}

async function complaint(response) {
  try {
    const { error } = await response.json();
    if (typeof error === "string" && error) return error;
  } catch {
    // An error without words of its own is named by its number.
  }
  return `The server answered with error ${response.status}.`;
}

async function read(response, signal) {
  try {
    return await response.json();
  } catch (error) {
    throw isAbort(error) || signal?.aborted ? error : new Problem(AWAY);
  }
}

export const get = async (path, signal) => read(await request(path, undefined, signal), signal);

export const post = async (path, body, signal) => read(await request(path, body, signal), signal);

export async function* stream(path, body, signal) {
  const response = await request(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      const lines = (rest + (value ?? "")).split("\n");
      rest = done ? "" : lines.pop();
      for (const line of lines) if (line.trim()) yield eventOf(line);
      if (done) return;
    }
  } catch (error) {
    throw isAbort(error) || error instanceof Problem ? error : new Problem(AWAY);
  } finally {
    reader.cancel().catch(() => {});
  }
}

function eventOf(line) {
  const event = JSON.parse(line);
  if (event.type === "error") throw new Problem(event.error, 500);
  return event;
}

// A file the server makes: the browser saves it under the name that the server gives.
export async function download(path, body) {
  const response = await request(path, body);
  const name = /filename="([^"/\\]+)"/.exec(response.headers.get("Content-Disposition") ?? "")?.[1];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = name ?? "whence";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
