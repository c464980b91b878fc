"""SASRec by RecTools, through its public interface; `benchmarks/sequential.py` runs this in an environment of its own.

A step is one batch of users, each with all positions of its latest L items; data loading counts. Evaluation is from the
data frame to the metric: `Dataset.construct`, `recommend` (ten items a user), `calc_metrics`.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from datetime import timedelta

import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.metrics import NDCG, calc_metrics
from rectools.models import SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet

warnings.filterwarnings("ignore")
torch.set_num_threads(1)


class Clock(Callback):
    """CPU seconds and targets of all steps but the first `num_warm`; stops training when the budget is spent."""

    def __init__(self, budget: float, num_warm: int) -> None:
        self.budget, self.num_warm = budget, num_warm
        self.seconds, self.steps, self.targets, self.last = 0.0, 0, 0, 0.0

    def on_train_epoch_start(self, *_: object) -> None:
        self.last = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, module: object, outputs: object, batch: dict, number: int) -> None:
        now = time.process_time()
        spent, self.last = now - self.last, now
        if self.num_warm:
            self.num_warm -= 1
            return
        self.seconds += spent
        self.steps += 1
        self.targets += int((batch["y"] > 0).sum())
        trainer.should_stop = self.seconds >= self.budget


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--settings", type=json.loads, required=True)
    args = parser.parse_args()
    asked = args.settings
    seed_everything(asked["seed"])
    rows = pd.read_csv(f"{args.folder}/{args.data}.csv")
    rows.columns = [Columns.User, Columns.Item, Columns.Datetime]
    rows[Columns.Weight] = 1.0
    rows[Columns.Datetime] = pd.to_datetime(rows[Columns.Datetime], unit="s")
    left = rows.groupby(Columns.User).cumcount(ascending=False)
    clock = Clock(asked["seconds"], asked["num_warm"])

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=10**6,
            accelerator="cpu",
            devices=1,
            callbacks=[clock],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            max_time=timedelta(hours=2),
        )

    model = SASRecModel(
        n_factors=asked["width"],
        n_blocks=asked["num_blocks"],
        n_heads=asked["num_heads"],
        session_max_len=asked["max_length"],
        dropout_rate=asked["dropout"],
        loss="softmax",
        batch_size=asked["batch_size"],
        lr=asked["learning_rate"],
        get_trainer_func=trainer,
        recommend_batch_size=512,
        recommend_torch_device="cpu",
        item_net_block_types=(IdEmbeddingsItemNet,),
    )
    model.fit(Dataset.construct(rows[left >= 2]))
    clock = next(each for each in model.fit_trainer.callbacks if isinstance(each, Clock))  # fit() copies its trainer
    known, test = rows[left >= 1], rows[left == 0]
    users = test[Columns.User].unique()

    def evaluated(leave_out_seen: bool) -> float:
        lists = model.recommend(users=users, dataset=Dataset.construct(known), k=10, filter_viewed=leave_out_seen)
        metric = {"ndcg": NDCG(k=10, divide_by_achievable=True)}
        return float(calc_metrics(metric, reco=lists, interactions=test)["ndcg"])

    start = time.process_time()
    ndcg = evaluated(False)
    spent = time.process_time() - start
    print(
        json.dumps(
            {
                "seconds": clock.seconds,
                "steps": clock.steps,
                "targets": clock.targets,
                "evaluation_seconds": spent,
                "users": len(users),
                "ndcg": ndcg,
                "ndcg_unseen": evaluated(True) if asked["unseen"] else None,
            }
        )
    )


if __name__ == "__main__":
    main()
