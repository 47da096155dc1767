"""FLOOR 3: doing it. The only floor that may import torch."""
