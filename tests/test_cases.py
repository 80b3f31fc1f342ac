"""The table of real bugs: its command line."""

import json

import numpy as np
import onnx

from benchmarks import cases


def test_names_may_stand_behind_options(tmp_path, capsys):
    """As its help writes it; of two controls only the one named is audited."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[4] x) => (float[4] y) { y = Relu(x) }'
    )
    (tmp_path / "controls").mkdir()
    for name in ("this", "other"):
        onnx.save(model, tmp_path / "controls" / f"{name}.onnx")
        np.savez(tmp_path / "controls" / f"{name}.npz", x=np.ones(4, np.float32))
    (tmp_path / "index.json").write_text(json.dumps([]))
    assert cases.main([str(tmp_path), "--backends", "ort", "this"]) == 0
    assert capsys.readouterr().out.split() == ["1", "controls"]
