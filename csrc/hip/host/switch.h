/* The switch between two stacks: what a call must preserve is pushed, the stack pointer is kept in *from, and the
 * other stack goes on where it stopped. */
#ifndef KL_HOST_SWITCH_H
#define KL_HOST_SWITCH_H

#include <stddef.h>
#include <stdint.h>

extern "C" void kl_fibre_switch(void **from, void *to);

#if defined(__x86_64__)

asm(R"(
    .text
    .globl kl_fibre_switch
    .hidden kl_fibre_switch
    .type kl_fibre_switch, @function
kl_fibre_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size kl_fibre_switch, .-kl_fibre_switch
)");

/* a stack that begins at entry when it is first switched to */
static inline void *kl_fibre_start(char *top, void (*entry)())
{
    void **sp = reinterpret_cast<void **>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
    *--sp = nullptr; /* the return address of entry, which does not return */
    *--sp = reinterpret_cast<void *>(entry);
    for (int i = 0; i < 6; i++)
        *--sp = nullptr;
    return sp;
}

#elif defined(__aarch64__)

asm(R"(
    .text
    .globl kl_fibre_switch
    .hidden kl_fibre_switch
    .type kl_fibre_switch, %function
kl_fibre_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size kl_fibre_switch, .-kl_fibre_switch
)");

static inline void *kl_fibre_start(char *top, void (*entry)())
{
    void **sp = reinterpret_cast<void **>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15)) - 20;
    for (int i = 0; i < 20; i++)
        sp[i] = nullptr;
    sp[11] = reinterpret_cast<void *>(entry); /* x30 */
    return sp;
}

#else
#error "the host build of the HIP kernels runs on x86-64 and aarch64"
#endif

#endif
