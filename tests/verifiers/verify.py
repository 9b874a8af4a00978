"""Reads cases from standard input, `[{headers, body, secret}]`, and says of each what the public libraries for Python
make of it: `[{library: null | "why it was refused"}]`. What is neither good nor refused ends the script."""

import json
import sys

import standardwebhooks.webhooks
import svix.webhooks

LIBRARIES = {"PyPI standardwebhooks": standardwebhooks.webhooks, "PyPI svix": svix.webhooks}


def judge(library, case):
    try:
        library.Webhook(case["secret"]).verify(case["body"], case["headers"])
    except library.WebhookVerificationError as error:
        return str(error) or "refused"
    return None


cases = json.load(sys.stdin)
json.dump([{name: judge(library, case) for name, library in LIBRARIES.items()} for case in cases], sys.stdout)
