// What waits for something asks for it again, but only while somebody looks.

/** Well within the limit of calls of an address, in milliseconds. */
const EVERY = 10_000;

/** Runs it every ten seconds, and whenever the page is looked at again. Answers what ends that. */
export function again(run: () => unknown): () => void {
  const look = (): void => {
    if (document.visibilityState === "visible") run();
  };
  const timer = setInterval(look, EVERY);
  document.addEventListener("visibilitychange", look);
  return () => {
    clearInterval(timer);
    document.removeEventListener("visibilitychange", look);
  };
}
