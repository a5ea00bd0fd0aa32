/* What vpdpbusd and vpdpwssd make faster, compiled for AVX2 with AVX-VNNI; every other kernel is isa_avx2.c's. */
#define AVXVNNI kl_kernels_avxvnni
#include "avxvnni.inc"
