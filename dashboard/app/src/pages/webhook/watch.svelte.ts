// The events of a product, or of the team, as they happen. A stream ends after some minutes, and when the connection
// does: it is begun anew from a little before the last event, and what was shown already is known by its id. While
// nobody looks at the page nothing is watched: browsers have few connections for one server.

import { Code, ConnectError } from "@connectrpc/connect";

import type { Delivery, WatchedEvent } from "../../gen/paperkey/webhook/v1/webhook_pb";
import { Problem, ask, dateOf, timestampOf, webhooks } from "../../lib/api";

/** How much is shown; what is older goes. */
const SHOWN = 200;
/** How far before the last event a stream begins anew. */
const OVERLAP_MS = 5_000;
/** No stream begins earlier than an hour ago; a minute is left for clocks that differ. */
const LOOK_BACK_MS = 59 * 60_000;
const LASTED_MS = 5_000;
const LAST_WAIT_MS = 30_000;

export interface Happening {
  event: WatchedEvent;
  /** What became of it at this endpoint. */
  delivery: Delivery | null;
}

export type Connection = "connecting" | "live" | "waiting" | "paused" | "failed";

export class Watch {
  connection = $state<Connection>("connecting");
  problem = $state.raw<Problem | null>(null);
  /** Newest first. */
  happenings = $state.raw<Happening[]>([]);
  #stream: AbortController | null = null;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #since: Date;
  #failed = 0;

  constructor(
    private readonly productId: string,
    private readonly webhookId: string,
    private readonly changed: (delivery: Delivery) => void,
  ) {
    // What has just happened too.
    this.#since = new Date(Date.now() - 60_000);
  }

  start(): void {
    this.stop();
    this.#failed = 0;
    void this.#run();
  }

  /** Ends the stream. What happens until it is begun anew is shown then, as far as it is kept. */
  stop(): void {
    clearTimeout(this.#timer);
    this.#stream?.abort();
    this.#stream = null;
  }

  pause(): void {
    this.stop();
    this.connection = "paused";
  }

  async #run(): Promise<void> {
    const stream = new AbortController();
    this.#stream = stream;
    this.connection = "connecting";
    let readyAt = 0;
    let wait = 0;
    try {
      const since = timestampOf(new Date(Math.max(this.#since.getTime() - OVERLAP_MS, Date.now() - LOOK_BACK_MS)));
      const answers = webhooks.watchEvents({ productId: this.productId, ...(since ? { since } : {}) }, { signal: stream.signal });
      for await (const { event, delivery } of answers) {
        if (this.#stream !== stream) return;
        if (readyAt === 0) {
          readyAt = Date.now();
          this.connection = "live";
          this.problem = null;
        }
        if (event) this.#show(event);
        if (delivery?.webhookId === this.webhookId && delivery.delivery) this.#follow(delivery.delivery);
      }
    } catch (thrown) {
      if (this.#stream !== stream) return;
      const problem = Problem.from(thrown);
      this.problem = problem;
      wait = (problem.retryAfter ?? 0) * 1000;
      if (isFinal(thrown)) {
        this.connection = "failed";
        // Whoever is not signed in any more is shown where to.
        void ask(Promise.reject(thrown as Error)).catch(() => {});
        return;
      }
    }
    if (this.#stream !== stream) return;
    this.#failed = readyAt > 0 && Date.now() - readyAt >= LASTED_MS ? 0 : this.#failed + 1;
    if (this.#failed > 0) wait = Math.max(wait, Math.min(500 * 2 ** this.#failed, LAST_WAIT_MS));
    this.connection = wait > 0 ? "waiting" : "connecting";
    this.#timer = setTimeout(() => void this.#run(), wait);
  }

  #show(event: WatchedEvent): void {
    const at = dateOf(event.createdAt);
    if (at && at > this.#since) this.#since = at;
    if (this.happenings.some((known) => known.event.id === event.id)) return;
    this.happenings = [{ event, delivery: null }, ...this.happenings].slice(0, SHOWN);
  }

  #follow(delivery: Delivery): void {
    this.happenings = this.happenings.map((known) => (known.event.id === delivery.eventId ? { ...known, delivery } : known));
    this.changed(delivery);
  }
}

/** Whether asking again would be answered alike. */
function isFinal(thrown: unknown): boolean {
  return (
    thrown instanceof ConnectError &&
    [Code.Unauthenticated, Code.PermissionDenied, Code.NotFound, Code.InvalidArgument, Code.Unimplemented].includes(thrown.code)
  );
}
