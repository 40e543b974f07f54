"""Evaluation of models: metrics, output change, calibration statistics, objectives for choosing q."""
