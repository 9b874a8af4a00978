// A file of licences is sent in parts of some thousand lines. A browser reads nothing of an answer before it has sent the
// whole body, and the server takes no more of a file than it can report on; a part is short enough, and shows how far it is.

import { Problem, onSignedOut, restHeaders } from "../../lib/api";

/** Records of a part. */
const PART = 10_000;
/** Lines that failed are kept to be shown, up to so many; the report has all. */
const SHOWN = 500;

export interface Failed {
  line: number;
  field: string | null;
  message: string;
}

export interface Progress {
  created: number;
  existing: number;
  failed: number;
  /** The last line that was reported on. */
  line: number;
  /** From 0 to 1. */
  share: number;
  shown: Failed[];
  /** The report, a JSON object a line. */
  report: string[];
}

interface Part {
  body: Blob;
  /** How many lines of the file stand before those of the part, its first line left out. */
  offset: number;
  /** Where it ends in the file. */
  end: number;
}

/** Cuts a CSV file where a record begins, as the server reads it; each part has the first line of the file. */
async function* parts(file: File): AsyncGenerator<Part> {
  const LF = 10, CR = 13, QUOTE = 34, COMMA = 44;
  let place: "between" | "start" | "plain" | "quoted" | "quote" = "between";
  let [at, line, afterCr, records] = [0, 1, false, 0];
  let head = { end: 0, lines: 0 };
  let from = { at: 0, line: 1 };
  const part = (end: number): Part => ({
    body: new Blob(head.end > 0 ? [file.slice(0, head.end), file.slice(from.at, end)] : [file.slice(0, end)]),
    offset: head.end > 0 ? from.line - 1 - head.lines : 0,
    end,
  });
  const reader = file.stream().getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    for (const byte of value) {
      const began = line;
      if (byte === CR || (byte === LF && !afterCr)) line++;
      afterCr = byte === CR;
      const isEnd = byte === CR || byte === LF;
      if (place === "between" && !isEnd) {
        place = "start";
        records++;
        if (records === 2) {
          head = { end: at, lines: began - 1 };
          from = { at, line: began };
        } else if (records > 2 && (records - 2) % PART === 0) {
          yield part(at);
          from = { at, line: began };
        }
      }
      if (isEnd && place !== "quoted") place = "between";
      else if (byte === QUOTE && place === "start") place = "quoted";
      else if (byte === QUOTE && place === "quoted") place = "quote";
      else if (byte === QUOTE && place === "quote") place = "quoted";
      else if (place !== "quoted") place = byte === COMMA ? "start" : "plain";
      at++;
    }
  }
  yield part(at);
}

/** Imports a file, and tells of its progress. What is thrown is a [`Problem`]. */
export async function importFile(file: File, productId: string, signal: AbortSignal, tell: (progress: Progress) => void): Promise<Progress> {
  const progress: Progress = { created: 0, existing: 0, failed: 0, line: 1, share: 0, shown: [], report: [] };
  for await (const part of parts(file)) {
    const answer = await send(part.body, productId, signal);
    if (!(await read(answer, part, progress, () => tell({ ...progress })))) {
      throw new Problem(
        `The report was cut off after line ${progress.line}. What it has told is done. Lines that have a key may be sent again; ` +
          "send lines without one again only if they come after that line.",
        "",
        {},
        null,
        answer.headers.get("x-request-id"),
      );
    }
    progress.share = file.size > 0 ? part.end / file.size : 1;
    tell({ ...progress });
  }
  return progress;
}

/** Sends a part. One that is refused because of a limit is sent again, as nothing of it was taken. */
async function send(body: Blob, productId: string, signal: AbortSignal): Promise<Response> {
  for (;;) {
    let answer: Response;
    try {
      answer = await fetch(`/licenses/import?productId=${encodeURIComponent(productId)}`, {
        method: "POST",
        headers: { ...restHeaders(), "Content-Type": "text/csv" },
        body,
        signal,
      });
    } catch (thrown) {
      if (signal.aborted) throw thrown;
      throw new Problem("The server could not be reached, or has not answered. What was reported is done.", "UNREACHABLE");
    }
    if (answer.ok) return answer;
    const wait = Number(answer.headers.get("retry-after") ?? 0);
    if (answer.status === 429 && wait > 0 && wait <= 120) {
      await new Promise((resolve) => setTimeout(resolve, wait * 1_000));
      signal.throwIfAborted();
      continue;
    }
    throw await refused(answer);
  }
}

async function refused(answer: Response): Promise<Problem> {
  const said = (await answer.json().catch(() => ({}))) as {
    error?: string;
    message?: string;
    details?: { field?: string; message?: string }[];
  };
  if (answer.status === 401) onSignedOut.call();
  const fields: Record<string, string> = {};
  for (const { field, message } of said.details ?? []) if (field) fields[field] = message ?? "";
  return new Problem(said.message ?? `The server answered ${answer.status}`, said.error ?? "", fields, null, answer.headers.get("x-request-id"));
}

/** Reads the report of a part; whether it came to its end. */
async function read(answer: Response, part: Part, progress: Progress, tell: () => void): Promise<boolean> {
  const reader = answer.body?.pipeThrough(new TextDecoderStream()).getReader();
  if (!reader) return false;
  let [rest, ended] = ["", false];
  const take = (text: string): void => {
    if (!text) return;
    const said = JSON.parse(text) as {
      line?: number;
      lines?: number;
      status?: string;
      error?: { field: string | null; message: string };
    };
    if (said.line === undefined) {
      ended = said.lines !== undefined;
      return;
    }
    said.line += part.offset;
    progress.line = said.line;
    progress.report.push(`${JSON.stringify(said)}\n`);
    if (said.status === "created") progress.created++;
    else if (said.status === "exists") progress.existing++;
    else {
      progress.failed++;
      if (progress.shown.length < SHOWN) progress.shown.push({ line: said.line, field: said.error?.field ?? null, message: said.error?.message ?? "" });
    }
  };
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop() ?? "";
      lines.forEach(take);
      tell();
    }
    take(rest);
  } catch {
    // Cut off, in the middle of a line perhaps.
    return false;
  }
  return ended;
}
