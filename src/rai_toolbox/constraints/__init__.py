"""Sets that a tensor can be kept in: pure tensor mathematics that knows no optimizer."""
