"""What terms between the layers cost over a distillation step's floor, and against the usual way of having them."""
