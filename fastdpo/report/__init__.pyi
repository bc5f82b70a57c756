from .picture import draw_training as draw_training
