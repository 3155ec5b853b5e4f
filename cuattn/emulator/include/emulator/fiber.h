// Switching between fibers: a few instructions on x86-64, ucontext elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

constexpr size_t stack_bytes = 128 * 1024;

#if defined(__x86_64__)

struct Context {
    void* stack_pointer = nullptr;
};

extern "C" void cuattn_emulator_switch(void** from, void* to);
__asm__(
    ".text\n.globl cuattn_emulator_switch\n.hidden cuattn_emulator_switch\ncuattn_emulator_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");

inline void switch_context(Context& from, Context& to) {
    cuattn_emulator_switch(&from.stack_pointer, to.stack_pointer);
}

// The stack of a fiber that starts in `entry`, aligned as after a call.
inline void make_context(Context& context, char* stack, void (*entry)()) {
    auto* top = reinterpret_cast<uint64_t*>(reinterpret_cast<uint64_t>(stack + stack_bytes) & ~uint64_t{15});
    *--top = 0;
    *--top = reinterpret_cast<uint64_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    context.stack_pointer = top;
}

#else

struct Context {
    ucontext_t context;
};

inline void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

inline void make_context(Context& context, char* stack, void (*entry)()) {
    getcontext(&context.context);
    context.context.uc_stack = {stack, 0, stack_bytes};
    context.context.uc_link = nullptr;
    makecontext(&context.context, entry, 0);
}

#endif

}  // namespace emulator
