"""One engine on several devices: partition of the model, worker processes, and all-reduce."""
