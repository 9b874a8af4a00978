// Products and clients to choose from. The newest hundred are fetched, and more when somebody asks for them: a team may
// have thousands.

import { Problem, ask, clients, products } from "./api";

export interface Option {
  value: string;
  label: string;
}

/** What is chosen to be shown more. */
const MORE = "more…";

export class ProductChoices {
  all = $state.raw<Option[]>([]);
  problem = $state.raw<Problem | null>(null);
  #next = $state<string | undefined>("");

  #first = this.more();

  /** The newest product, which is what a form begins with; empty where there is none. */
  async newest(): Promise<string> {
    await this.#first;
    return this.all[0]?.value ?? "";
  }

  async more(): Promise<void> {
    try {
      const page = await ask(products.listProducts({ pageSize: 100, pageToken: this.#next ?? "" }));
      const known = new Set(this.all.map((option) => option.value));
      const fresh = page.products.filter((product) => !known.has(product.id));
      this.all = [...this.all, ...fresh.map(({ id, name }) => ({ value: id, label: name }))];
      this.#next = page.nextPageToken;
      this.problem = null;
    } catch (thrown) {
      this.problem = Problem.from(thrown);
    }
  }

  /** The options of a field that begins with `first`; `chosen` is among them, known or not. */
  options(first: string, chosen = ""): Option[] {
    const unknown = chosen && chosen !== MORE && !this.all.some((option) => option.value === chosen);
    return [
      { value: "", label: first },
      ...this.all,
      ...(unknown ? [{ value: chosen, label: chosen }] : []),
      ...(this.#next ? [{ value: MORE, label: "Show older products…" }] : []),
    ];
  }

  /** What was chosen, or nothing where that was to be shown more. */
  chosen(value: string): string {
    if (value !== MORE) return value;
    void this.more();
    return "";
  }

  /** What a product is called, as far as that is known. */
  name(id: string): string {
    return this.all.find((option) => option.value === id)?.label ?? id;
  }
}

/** The client that somebody means: by id, or by email address. */
export async function clientOf(text: string): Promise<string | undefined> {
  const wanted = text.trim();
  if (!wanted || !wanted.includes("@")) return wanted || undefined;
  const found = await ask(clients.listClients({ email: wanted, pageSize: 2 }));
  if (found.clients.length === 1) return found.clients[0]?.id;
  const said = found.clients.length === 0 ? "no client has this email address" : "several clients have this address: give the id";
  throw new Problem("The client is not clear", "", { client_id: said });
}

/** The clients that are offered. */
export async function newestClients(): Promise<Option[]> {
  const { clients: found } = await ask(clients.listClients({ pageSize: 100 }));
  return found.map(({ id, name, email }) => ({ value: id, label: email ? `${name} · ${email}` : name }));
}
