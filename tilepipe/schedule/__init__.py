"""Who runs which unit when: the graph of units, the Dask client, the bounded stream."""

from tilepipe.schedule.dag import Dag, Stage
from tilepipe.schedule.task import Outcome, Task

__all__ = ["Dag", "Outcome", "Stage", "Task"]
