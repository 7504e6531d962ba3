#!/usr/bin/env bash
# Prune the embedded model to 30 % of its latency, with int8, on this machine; prints accuracy, latency and size before and after.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-demo.run}
mkdir -p "$out"
exec onnxprune "$here/model.onnx" --passes heads,ffn,int8 --target-latency 30% --calib "$here/calib.npz" -o "$out/small.onnx" --run-dir "$out"
