"""Pipelined backpropagation with weight prediction (Kosson et al. 2021): the pipeline that never drains."""
