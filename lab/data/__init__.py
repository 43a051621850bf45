"""Images and labels: CIFAR-10, drawn shapes, and other people's benchmarks beside them."""
