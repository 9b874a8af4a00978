"""What the schemas say of Kubernetes' manifests, and YAML as JSON, read strictly.

    judge.py yaml FILE…              every document of the files, as lines of JSON; a key that is there twice is an error
    judge.py kubernetes VERSION FILE holds every manifest against the schema of its kind, and refuses what it does not know
"""

import json
import logging
import sys

import kubernetes_validate
import yaml

# Kinds that others bring to a cluster, whose schemas are theirs.
FOREIGN = {"cert-manager.io/v1", "monitoring.coreos.com/v1"}


class Strict(yaml.SafeLoader):
    """Refuses keys that are there twice, of which everybody else takes the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def documents(path):
    with open(path, encoding="utf-8") as file:
        return [document for document in yaml.load_all(file, Strict) if document is not None]


def judge(version, path):
    wrong = []
    for manifest in documents(path):
        if manifest["apiVersion"] in FOREIGN:
            continue
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            where = "/".join(map(str, error.path))
            wrong.append(f"{manifest['kind']} {manifest['metadata']['name']}: {where}: {error.message}")
        except kubernetes_validate.SchemaNotFoundError as error:
            wrong.append(str(error))
    return wrong


def main(what, *arguments):
    logging.disable(logging.CRITICAL)
    if what == "kubernetes":
        wrong = judge(*arguments)
        print("\n".join(wrong))
        return 1 if wrong else 0
    for path in arguments:
        for document in documents(path):
            print(json.dumps(document, default=str))
    return 0


sys.exit(main(*sys.argv[1:]))
