/* isa_avxvnni.c as processors with AVX-512 encode it, which prove it so. */
#define AVXVNNI kl_kernels_avxvnni_evex
#include "avxvnni.inc"
