"""Where an image tower looks: heatmaps of evidence for a prompt's or a head's score, made when they are asked for.

`targets.py` says what is sought, `methods.py` how and for which towers, `explainer.py` runs it for a batch of images
and labels. Below them: `passes.py` (one pass for many labels), `class_token.py` (its shortcut where a class token is
pooled), `weighting.py` (the CAM family's formulas), `attention.py` (Grad-ECLIP, LeGrad, rollout), `library.py` (the
rest of pytorch-grad-cam), `maps.py` (what a raw map says).
"""

from analysis.cam.explainer import Explainer, Layer, heatmap
from analysis.cam.layers import LayerMaps, layer_strip
from analysis.cam.maps import HeatMap, RawMaps, ZeroGradientError
from analysis.cam.methods import METHODS, Method, methods_for
from analysis.cam.passes import Tokens
from analysis.cam.targets import HeadTarget, Target, TextTarget

__all__ = [
    "METHODS",
    "Explainer",
    "HeadTarget",
    "HeatMap",
    "Layer",
    "LayerMaps",
    "Method",
    "RawMaps",
    "Target",
    "TextTarget",
    "Tokens",
    "ZeroGradientError",
    "heatmap",
    "layer_strip",
    "methods_for",
]
