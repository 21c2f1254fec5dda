"""Calibration data through a graph: statistics, layer by layer runs, Hessians, texts."""
