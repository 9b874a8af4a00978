// Where in the dashboard the page is: the path below /app/, and the query, in which filters stand.

const BASE = "/app";

function read(): { path: string; query: URLSearchParams } {
  const path = location.pathname.slice(BASE.length).replace(/\/+$/, "") || "/";
  return { path, query: new URLSearchParams(location.search) };
}

class Router {
  #at = $state.raw(read());

  constructor() {
    addEventListener("popstate", () => (this.#at = read()));
    // Links within the dashboard are ordinary links, so that they can be opened in a new tab.
    addEventListener("click", (event) => {
      const link = (event.target as Element | null)?.closest?.("a[href]") as HTMLAnchorElement | null;
      if (!link || event.defaultPrevented || event.button !== 0) return;
      if (event.metaKey || event.ctrlKey || event.shiftKey || event.altKey || link.target || link.download) return;
      if (link.origin !== location.origin || !link.pathname.startsWith(`${BASE}/`)) return;
      event.preventDefault();
      this.go(link.pathname.slice(BASE.length) + link.search);
    });
  }

  /** Such as `/licenses/lic_1`. */
  get path(): string {
    return this.#at.path;
  }

  get query(): URLSearchParams {
    return this.#at.query;
  }

  /** Goes to a path below /app, such as `/products?x=1`. */
  go(to: string, { replace = false } = {}): void {
    history[replace ? "replaceState" : "pushState"](null, "", BASE + to);
    const before = this.#at.path;
    this.#at = read();
    if (this.#at.path !== before) {
      scrollTo(0, 0);
      // Who reads by ear or by keyboard begins at the new page.
      requestAnimationFrame(() => document.querySelector<HTMLElement>("main")?.focus({ preventScroll: true }));
    }
  }

  /** Changes the query: what is empty is left out. Filters do not fill the history. */
  filter(changes: Record<string, string | null | undefined>): void {
    const query = new URLSearchParams(this.#at.query);
    for (const [name, value] of Object.entries(changes)) {
      if (value) query.set(name, value);
      else query.delete(name);
    }
    const text = query.toString();
    this.go(this.#at.path + (text ? `?${text}` : ""), { replace: true });
  }

  /** A wish of the address, such as `?new=1`: it is told once, and taken out of the address. */
  take(name: string): string | null {
    const value = this.query.get(name);
    if (value !== null) this.filter({ [name]: null });
    return value;
  }

  /** The parts of the path that a pattern such as `/products/:id` names; null where it does not fit. */
  match(pattern: string): Record<string, string> | null {
    const wanted = pattern.split("/");
    const found = this.#at.path.split("/");
    if (wanted.length !== found.length) return null;
    const parts: Record<string, string> = {};
    for (const [at, name] of wanted.entries()) {
      const part = found[at] ?? "";
      if (!name.startsWith(":")) {
        if (name !== part) return null;
        continue;
      }
      try {
        parts[name.slice(1)] = decodeURIComponent(part);
      } catch {
        return null;
      }
    }
    return parts;
  }
}

export const router = new Router();

/** The address of a path within the dashboard, for links. */
export const href = (path: string): string => BASE + path;
