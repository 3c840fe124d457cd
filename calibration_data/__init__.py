"""Bundled calibration text. Empty until calibration itself arrives."""

if __name__ != "llmcompress.calibration_data":
    raise ImportError("this folder installs as llmcompress.calibration_data: import it under that name")
