"""What a model can be asked about every row of a dataset: one file a task, one table."""

from __future__ import annotations

from mmflow.inference.result import Result
from mmflow.inference.tasks.answer import Answer
from mmflow.inference.tasks.caption import Caption
from mmflow.inference.tasks.classify import Classify
from mmflow.inference.tasks.embed import CaptionEmbeddings, ImageEmbeddings
from mmflow.inference.tasks.match import Match
from mmflow.inference.tasks.neighbours import Neighbours
from mmflow.inference.tasks.perplexity import Perplexity
from mmflow.inference.tasks.zero_shot import ZeroShot

TASKS: dict[str, tuple[type[Result], ...]] = {
    "embed": (ImageEmbeddings, CaptionEmbeddings),
    "zero_shot": (ZeroShot,),
    "classify": (Classify,),
    "match": (Match,),
    "caption": (Caption,),
    "answer": (Answer,),
    "perplexity": (Perplexity,),
    "neighbours": (Neighbours,),
}
"""By the name of their section in `score.tasks`: the results that it is made of."""
