/* isa_avxvnni.c as processors with AVX-512 encode it, which prove it so. */
#define AVXVNNI(name) kl_avxvnni_evex_##name
#include "avxvnni.inc"
