"""What every measurement needs: the clock, the allocator, and the description of the machine."""
