// Reads cases from standard input, `[{headers, body, secret}]`, and says of each what the public libraries for Node make
// of it: `[{library: null | "why it was refused"}]`. What is neither good nor refused ends the script.
import { text } from "node:stream/consumers";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

// The libraries are installed elsewhere: the folder is named by the first argument.
const require = createRequire(pathToFileURL(`${process.argv[2]}/`));
const libraries = { "npm standardwebhooks": require("standardwebhooks"), "npm svix": require("svix") };

const judge = ({ Webhook, WebhookVerificationError }, { headers, body, secret }) => {
  try {
    new Webhook(secret).verify(body, headers);
    return null;
  } catch (error) {
    if (error instanceof WebhookVerificationError) return error.message || "refused";
    throw error;
  }
};

const cases = JSON.parse(await text(process.stdin));
const verdicts = cases.map((one) =>
  Object.fromEntries(Object.entries(libraries).map(([name, library]) => [name, judge(library, one)])),
);
process.stdout.write(JSON.stringify(verdicts));
