// The events of a product as they happen, for pages that move on by themselves.

import { timestampNow } from "@bufbuild/protobuf/wkt";

import { webhooks } from "./api";

const FIRST_PAUSE_MS = 10_000;
const LONGEST_PAUSE_MS = 120_000;

const pause = (ms: number, signal: AbortSignal): Promise<void> =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    });
  });

/** Until the page is looked at. A browser has few connections to a host: what nobody sees holds none. */
const seen = (signal: AbortSignal): Promise<void> =>
  new Promise((resolve) => {
    if (!document.hidden || signal.aborted) return resolve();
    const end = new AbortController();
    const look = (): void => {
      if (document.hidden && !signal.aborted) return;
      end.abort();
      resolve();
    };
    document.addEventListener("visibilitychange", look, { signal: end.signal });
    signal.addEventListener("abort", look, { signal: end.signal });
  });

/**
 * Tells of every event, such as `license.created`, with the data that its deliveries carry, until the signal. What the
 * connection loses is asked for again, for an hour; `joined` is called whenever it is there anew, after which nothing is
 * missed. An event may be told of twice.
 */
export async function follow(
  productId: string,
  signal: AbortSignal,
  happened: (event: string, data: Record<string, unknown>) => void,
  joined: () => void = () => {},
): Promise<void> {
  let since = timestampNow();
  let wait = FIRST_PAUSE_MS;
  while (!signal.aborted) {
    await seen(signal);
    const connection = new AbortController();
    const end = (): void => {
      if (document.hidden || signal.aborted) connection.abort();
    };
    document.addEventListener("visibilitychange", end, { signal: connection.signal });
    signal.addEventListener("abort", end, { signal: connection.signal });
    end();
    try {
      for await (const { event, delivery } of webhooks.watchEvents({ productId, since }, { signal: connection.signal })) {
        wait = FIRST_PAUSE_MS;
        if (event) {
          since = event.createdAt ?? since;
          happened(event.event, (JSON.parse(event.payload) as { data?: Record<string, unknown> }).data ?? {});
        } else if (!delivery) joined();
      }
    } catch {
      // Whoever may not watch, or has no connection now, is served by asking from time to time.
    }
    // Whoever comes back to the page does not wait.
    if (!connection.signal.aborted) {
      await pause(wait, signal);
      wait = Math.min(wait * 2, LONGEST_PAUSE_MS);
    }
    connection.abort();
  }
}
