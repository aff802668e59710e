"""What a distillation step costs over its floor: the teacher's forward pass and a plain training step."""
