"""What compiles and measures kernels outside of a launch: inspect, tune, estimate, warming up."""
