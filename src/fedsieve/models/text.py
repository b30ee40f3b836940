"""Networks for sequences of tokens."""

from __future__ import annotations

from torch import Tensor, nn

from fedsieve.errors import UsageError

EMBEDDING = 8
HIDDEN = 256


class CharLSTM(nn.Module):
    """Predict each next character: embedding, two LSTM layers, linear."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, EMBEDDING)
        self.lstm = nn.LSTM(EMBEDDING, HIDDEN, num_layers=2, batch_first=True)
        self.fc = nn.Linear(HIDDEN, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T), int64 in [0, vocabulary), to scores (B, T, vocabulary) of the token that follows each."""
        outputs, _ = self.lstm(self.embedding(tokens))
        scores: Tensor = self.fc(outputs)
        return scores


def charlstm(shape: tuple[int, ...], classes: int) -> CharLSTM:
    """Make the character LSTM of McMahan et al. 2017 (arXiv 1602.05629) for Shakespeare; the vocabulary is the classes.

    Deviates: it predicts at every position, not only after the last; PyTorch's LSTM has two bias vectors a layer.
    """
    if len(shape) != 1:
        raise UsageError(
            f"model 'charlstm' takes sequences of tokens, shape (length,); one example of the data has shape {shape}.\n"
            "Set model.name to one that fits (`fedsieve list models`), or data.name to text."
        )
    return CharLSTM(classes)
