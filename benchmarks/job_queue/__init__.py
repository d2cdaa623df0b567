"""What the queue costs: batchmill's, its peers', and bare Redis Streams, on the same requests."""
