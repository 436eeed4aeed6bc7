"""FlexModel: read and edit unsharded activations in one session."""
