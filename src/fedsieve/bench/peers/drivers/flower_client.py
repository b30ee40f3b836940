"""Flower's client, in a module of its own, which the simulation's workers import: what they hold lasts from call to call."""

from functools import lru_cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from textbook import Job
from torch import nn

app = ClientApp()
read = lru_cache(maxsize=1)(Job.read)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model of the message for an epoch on this client's examples, as Flower's PyTorch quickstart does."""
    job = read(message.content["config"]["path"])
    network = job.network()
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimiser = torch.optim.SGD(network.parameters(), lr=job.lr)
    part = job.parts[context.node_config["partition-id"]]
    running = 0.0
    for batch in torch.split(part[torch.randperm(len(part))], job.batch):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(network(job.x_train[batch]), job.y_train[batch])
        loss.backward()
        optimiser.step()
        running += loss.item() * len(batch)
    metrics = MetricRecord({"train_loss": running / len(part), "num-examples": len(part)})
    content = RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)
