"""What sequences keep between steps: layout as arithmetic, pools of memory, slots and blocks, and a step's tables."""
