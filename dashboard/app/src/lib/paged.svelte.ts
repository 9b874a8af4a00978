// A list that comes page by page, by the server's tokens. One page is on the screen at a time, so a list of a hundred
// thousand costs what one of fifty costs.

import { Problem } from "./api";

export interface Page<T> {
  items: T[];
  next: string | undefined;
}

export class Paged<T> {
  items = $state.raw<T[]>([]);
  loading = $state(true);
  problem = $state.raw<Problem | null>(null);
  #tokens = $state.raw<string[]>([""]);
  #next = $state<string | undefined>(undefined);
  #asked = 0;

  constructor(private readonly fetch: (token: string) => Promise<Page<T>>) {}

  get number(): number {
    return this.#tokens.length;
  }

  get hasNext(): boolean {
    return this.#next !== undefined && this.#next !== "";
  }

  get hasPrevious(): boolean {
    return this.#tokens.length > 1;
  }

  get isEmpty(): boolean {
    return !this.loading && !this.problem && this.items.length === 0 && !this.hasPrevious && !this.hasNext;
  }

  /** From the first page. */
  async restart(): Promise<void> {
    this.#tokens = [""];
    await this.reload();
  }

  async next(): Promise<void> {
    if (this.hasNext) {
      this.#tokens = [...this.#tokens, this.#next ?? ""];
      await this.reload();
    }
  }

  async previous(): Promise<void> {
    if (this.hasPrevious) {
      this.#tokens = this.#tokens.slice(0, -1);
      await this.reload();
    }
  }

  /** Asks whether the first thing has come to a list that was empty, and shows no other change until it has. */
  async look(): Promise<void> {
    if (!this.isEmpty) return;
    const asked = ++this.#asked;
    try {
      const page = await this.fetch("");
      if (asked !== this.#asked || page.items.length === 0) return;
      this.items = page.items;
      this.#next = page.next;
    } catch {
      // It is asked again soon.
    }
  }

  /** The same page again. */
  async reload(): Promise<void> {
    const asked = ++this.#asked;
    this.loading = true;
    try {
      const page = await this.fetch(this.#tokens.at(-1) ?? "");
      // Only the last question's answer counts.
      if (asked !== this.#asked) return;
      this.items = page.items;
      this.#next = page.next;
      this.problem = null;
    } catch (thrown) {
      if (asked !== this.#asked) return;
      this.problem = Problem.from(thrown);
      // What comes after a page that did not come is not known.
      this.#next = undefined;
    } finally {
      if (asked === this.#asked) this.loading = false;
    }
  }
}
