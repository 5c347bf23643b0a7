"""clip-retrieval's own command line, run in its environment: `python peers_clip_retrieval.py inference …`.

The folder $OPEN_CLIP_MODELS holds configurations beside those of open_clip's release, and `weights NAME FILE` writes
random weights of any. The processes that clip-retrieval spawns import this file too.
"""

import os
import sys
from importlib.metadata import version

import torch

if "+cpu" in torch.__version__ and "+cpu" not in version("torchvision"):
    # The registries' torchvision is built for CUDA, so that a CPU's torch cannot load its compiled operators. CLIP uses
    # none of them, but torchvision describes these two as it is imported, and they must exist by then.
    operators = torch.library.Library("torchvision", "DEF")
    operators.define("nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")

import open_clip

open_clip.add_model_config(os.environ["OPEN_CLIP_MODELS"])

if __name__ == "__main__":
    if sys.argv[1] == "weights":
        name, path = sys.argv[2:]
        torch.manual_seed(0)
        torch.save(open_clip.create_model(name).state_dict(), path)
    else:
        from clip_retrieval.cli import main

        main()
