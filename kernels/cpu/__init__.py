"""CPU kernels in C++; registered where the native extension is built."""
