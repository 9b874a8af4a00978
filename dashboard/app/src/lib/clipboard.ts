// Copies text. On plain http, other than on this machine itself, browsers offer no clipboard: then an old way is taken.

import { toasts } from "./toasts.svelte";

/** Says so where it cannot be done. */
export async function copy(text: string): Promise<boolean> {
  const done = await tried(text);
  if (!done) toasts.tell("This browser does not let a page copy: select the text instead", true);
  return done;
}

async function tried(text: string): Promise<boolean> {
  try {
    if (navigator.clipboard) {
      await navigator.clipboard.writeText(text);
      return true;
    }
  } catch {
    // Not allowed here: the other way may be.
  }
  const area = document.createElement("textarea");
  area.value = text;
  area.style.position = "fixed";
  area.style.opacity = "0";
  const before = document.activeElement;
  // A dialog keeps the focus within itself, so the text must stand in it: in the one above the others.
  ([...document.querySelectorAll("dialog[open]")].at(-1) ?? document.body).append(area);
  area.select();
  try {
    return document.execCommand("copy");
  } catch {
    return false;
  } finally {
    area.remove();
    if (before instanceof HTMLElement) before.focus({ preventScroll: true });
  }
}

/** Gives the browser a file to save. */
export function save(name: string, type: string, pieces: BlobPart[]): void {
  const url = URL.createObjectURL(new Blob(pieces, { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
