// Short news at the edge of the page, which go by themselves.

import { Problem } from "./api";

class Toasts {
  shown = $state<{ id: number; text: string; bad: boolean }[]>([]);
  #last = 0;

  tell(text: string, bad = false): void {
    const id = ++this.#last;
    this.shown.push({ id, text, bad });
    setTimeout(() => this.dismiss(id), bad ? 8_000 : 4_000);
  }

  /** Tells why something failed, with the id of the request. */
  fail(thrown: unknown): void {
    const { message, requestId } = Problem.from(thrown);
    this.tell(requestId ? `${message} (${requestId})` : message, true);
  }

  dismiss(id: number): void {
    this.shown = this.shown.filter((toast) => toast.id !== id);
  }
}

export const toasts = new Toasts();
