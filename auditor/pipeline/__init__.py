"""What happens before and after the network, on both sides, as segments of the same audit.

- ``description`` reads a pipeline's description (``presets/``; ``huggingface`` turns another
  format into one), ``photos`` finds the photographs, and ``labels`` what is said of them.
- ``preprocessing/`` makes the network's input of a photograph, ``postprocessing/`` a result of the
  network's outputs.
- ``upstream`` puts both around the network that is audited.
- ``sysnoise/`` measures the table of the SysNoise paper; ``scoring`` and ``tasks/`` judge results
  by labels.
- ``forensics/`` searches for the pipeline that made a given input or result.
"""
