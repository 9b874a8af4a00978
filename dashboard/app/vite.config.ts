import { svelte } from "@sveltejs/vite-plugin-svelte";
import tailwindcss from "@tailwindcss/vite";
import { defineConfig } from "vite";

// The same sources give the same bytes: what is built is kept in the repository.
export default defineConfig({
  base: "/app/",
  plugins: [svelte(), tailwindcss()],
  // For work on the page: `npx vite` serves it, and asks a Paperkey that runs elsewhere.
  server: {
    proxy: {
      "^/(paperkey\\.|auth/|teams|products|licenses|v1/|api/|docs/)": process.env["PAPERKEY_URL"] ?? "http://127.0.0.1:8080",
    },
  },
  build: {
    outDir: "../dist/app",
    emptyOutDir: true,
    target: "es2022",
    // A data: URL would be a second way for a file to come.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    rolldownOptions: {
      output: {
        // The door comes first, with what all share; the pages come together, since alike things compress well; the chart
        // comes when it is looked at.
        codeSplitting: { groups: [{ name: "pages", test: /\/src\/pages\/(?!Door|doors|NotFound)/, includeDependenciesRecursively: false }] },
      },
    },
  },
});
