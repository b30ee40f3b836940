"""What runs on a client: training and evaluation of one module on flat buffers."""
